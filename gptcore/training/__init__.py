"""One trainer, as a process of its own: pretraining and fine-tuning are the same loop."""
