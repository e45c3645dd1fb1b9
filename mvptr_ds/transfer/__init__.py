"""What pre-training is worth: the demo's tasks, fine-tuned from several starts."""
