"""Local training: phases, distillation, cache of the frozen trunk. Knows nothing of NVFlare."""
