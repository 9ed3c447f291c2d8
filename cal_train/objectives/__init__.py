"""What a vision tower is pretrained for: one file per method, an `nn.Module` that owns its scale, bias and heads."""
