"""The engine: configs, steps, loops, checkpoints. It knows no architecture and imports nothing heavy by itself."""

__version__ = "0.1.0"
