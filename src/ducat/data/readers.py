"""One reader a layout: from a publisher's files to labelled images."""

import torch

from ducat.data.images import Images, hold_out


def read_digits() -> tuple[Images, Images]:
    """Read scikit-learn's 1,797 handwritten digits: (training, test) of 1,297 and 500 images of 8 x 8.

    They come as one set; the 500 for testing are a fixed stratified part of it. `ids` are positions in the whole set.
    Source: E. Alpaydin, C. Kaynak (1998), UCI Machine Learning Repository, "Optical Recognition of Handwritten Digits".
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    return hold_out(Images(grey, labels, torch.arange(len(labels))), 500)
