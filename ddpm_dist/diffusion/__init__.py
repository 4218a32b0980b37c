"""The mathematics of diffusion: schedules, the forward and reverse process, losses, samplers, likelihood.

Pure functions of tensors; the network is any callable network(x [B,C,H,W], t [B], labels [B] or None).
Times are counted from 0: index t here is t + 1 in Ho et al. 2020, x_{-1} is the image itself.
"""
