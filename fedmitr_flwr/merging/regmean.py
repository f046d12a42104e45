"""RegMean (Jin et al. 2023) [C]: the clients' average, each linear layer merged by what the clients' layers are given.

A layer takes the weights W that answer most as the clients' own do, each on what this client's layer is given on the
client's images: the least Σ_k n_k E|W x - W_k x|² / E|x|². No image is needed, only second moments.

Deviations [M]: of these the clients tell leading directions only (statistics/inputs.py); by E|x|² no client counts more
than its images do, whatever it says; nothing is scaled down off the diagonal; patch embedding and head are merged, too.

Shapes: I inputs of a layer, with the constant 1 of its bias, O outputs.
"""

from collections.abc import Sequence

import torch

from ..statistics.inputs import PREFIX, REST, moment, widths
from ..uploads.upload import Upload
from ..vit.build import Weights
from .average import average
from .layerwise import joined, least_squares

RIDGE = 1e-6  # of the mean second moment: so that there is one solution where no client had an input


def regmean(uploads: Sequence[Upload]) -> Weights:
    """The merged weights. Norms, prefix tokens and positions are averaged, as is what no client had as an input.

    One layer of one upload is read at a time.
    """
    merged = average(uploads)
    for place, layer in enumerate(widths(merged)):
        mean_OI = joined(merged[f"{layer}.weight"], merged.get(f"{layer}.bias"))
        inputs = mean_OI.shape[1]
        gram_II, cross_OI = mean_OI.new_zeros(inputs, inputs), torch.zeros_like(mean_OI)
        for upload in uploads:
            assert upload.statistics is not None, "upload.extras, which methods check"
            moment_II = moment(upload.statistics[PREFIX + layer], upload.statistics[REST][place])
            moment_II *= upload.num_examples / moment_II.trace()
            gram_II += moment_II
            own_OI = joined(upload.weights[f"{layer}.weight"], upload.weights.get(f"{layer}.bias"))
            cross_OI += own_OI @ moment_II
        solved_OI = least_squares(gram_II, cross_OI, mean_OI, RIDGE)
        weight = merged[f"{layer}.weight"]
        fan_in = weight[0].numel()
        merged[f"{layer}.weight"] = solved_OI[:, :fan_in].to(weight.dtype).view_as(weight)
        if inputs > fan_in:
            merged[f"{layer}.bias"] = solved_OI[:, fan_in].to(weight.dtype)
    return merged
