"""The fused residual add: y = residual, y[index] += scale * dropout(x + bias)."""
