"""Execution of networks: devices, autotuning, speed and memory."""
