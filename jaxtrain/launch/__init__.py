"""Ways to start the processes of a run. They start processes and watch them; they train nothing."""
