# What does each part of the default architecture bring? One change at a time:
#     python -m tools.ablate config/ablate_architecture.py --json=ablate.json --png=ablate.png
# 39 runs of about ten seconds of one idle core. A larger base takes longer and says more; the widths in two
# of the changes belong to this one. docs/architecture_studies.md shows the results.

base = ["train.py --n_layer=2 --n_embd=64 --n_head=4 --n_kv_head=4 --intermediate_size=192 --block_size=64 "
        "--max_steps=200 --sample_tokens=0 --save_interval=0 --eval_tokens=16384 --log_interval=50 "
        "--device=cpu --threads=1"]
changes = {
    "no positions (NoPE)": "position=none",
    "learned positions": "position=learned",
    "sink logits": "sink_logits=True",
    "GQA, 2 key/value heads": "n_kv_head=2",
    "MQA, 1 key/value head": "n_kv_head=1",
    "QK-norm": "qk_norm=True",
    "4 experts, 2 per token": "n_expert=4 expert_size=96",  # the base's FLOPs: 2 x 96 = 192
    "LayerNorm": "norm=layernorm",
    "GELU": "mlp=gelu intermediate_size=288",  # the base's parameters: 2 x 288 = 3 x 192
    "AdamW for Muon": "optimizer=adamw",
    "AdamW at 2e-3": "optimizer=adamw learning_rate=2e-3",
    "untied table": "tie_embeddings=False",
}
out_dir = "out/ablate_architecture"
