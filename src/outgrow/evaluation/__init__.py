"""What a checkpoint can do: benchmark tasks, held-out loss, text."""
