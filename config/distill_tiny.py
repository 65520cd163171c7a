# A quarter of the default model, pruned from it and distilled from it, in a minute or two.
#   python train.py && python distill.py config/distill_tiny.py
out_dir = "out/distill_tiny"
student_layers = "0,2"
n_embd = 128
n_head = 2
intermediate_size = 256
max_steps = 200
eval_interval = 0
save_interval = 0
