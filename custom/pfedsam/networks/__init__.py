"""SAM with LoRA and experts: backbones, adapters, the network."""
