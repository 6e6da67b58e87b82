"""Quality on real input. Nothing here imports `ropewalk.ops`."""
