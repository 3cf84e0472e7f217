"""What a run leaves to look at: its folder, metrics, plots and closing numbers. It never changes the training."""
