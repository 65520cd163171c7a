# Stage 1 trains the layers to match the teacher's layers, with the teacher's embedding table frozen and
# cross-entropy on the text. Stage 2 is ordinary distillation of the predictions.
#   python train.py && python distill.py config/distill_two_stage.py
out_dir = "out/distill_two_stage"
student_layers = "0,2"
n_embd = 128
n_head = 2
intermediate_size = 256
stages = [
    dict(steps=150, alpha=0.0, hidden_weight=1.0, attention_weight=0.5, lr_multipliers={"embed_tokens": 0.0}),
    dict(steps=400, restart=True, alpha=0.9),
]
