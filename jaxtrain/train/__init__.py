"""From a config to a trained state: precision, loss, optimizer, state, step and the loop. It stores and prints nothing."""
