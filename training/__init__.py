"""What every training stage uses: run folder, stages, metrics, optimizers, losses, LoRA."""
