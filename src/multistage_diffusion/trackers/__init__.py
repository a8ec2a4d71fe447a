"""Trackers: what a run logs, sent to another program. One file in this folder adds one."""
