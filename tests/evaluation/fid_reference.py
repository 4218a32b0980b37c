"""torch-fidelity's features, for test_fid_reference.py; runs in the environment of requirements-fid.txt.

PYTHON fid_reference.py WEIGHTS.pth IMAGES.npy OUT.npz
"""

import sys

import numpy as np
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

if __name__ == "__main__":
    weights, images, out = sys.argv[1:]
    extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights).eval()
    with torch.no_grad():
        features, logits = extractor(torch.from_numpy(np.load(images)))
    np.savez(out, features=features.numpy(), logits=logits.numpy())
