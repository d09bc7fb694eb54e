"""Fused kernels of the token loss; `purified_opsd_trl.loss` is their public face."""
