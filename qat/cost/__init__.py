"""What a model costs: operations, bytes, memory and seconds, and what of it is quantized."""
