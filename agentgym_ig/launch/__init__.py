"""Configurations of `accelerate launch` for several processes: `ddp.yaml` and `fsdp.yaml`."""
