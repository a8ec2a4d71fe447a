"""Published checkpoints: safe reading (without running code from the file) and writing in their layouts."""
