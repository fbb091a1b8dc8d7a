"""What each figure of a study shows, and what it does not: two sentences, read before the picture is believed."""

from __future__ import annotations

from typing import NamedTuple


class Caption(NamedTuple):
    """A figure's title, a sentence on what it shows, and one on what it does not.

    ``{reader}`` stands for the token, or tokens, that the model's answer is read from.
    """

    title: str
    shows: str
    hides: str


CAPTIONS = {
    "attention": Caption(
        "Attention over images",
        "Each image, and over it in colour how much of every patch reaches {reader} by attention rollout: the layers' "
        "attention, averaged over heads and with half of it kept for the residual connection, multiplied together "
        "(Abnar and Zuidema 2020; figure 6 of the ViT paper).",
        "Rollout knows nothing of values, MLPs or classes, so that a bright patch was looked at and not necessarily "
        "used, and each map goes from nothing to its own largest value, so that brightness cannot be compared "
        "between images.",
    ),
    "gallery": Caption(
        "Many images with attention",
        "The same for all images of this study, in the order of the data (figure 14 of the ViT paper): the eye finds "
        "what is common to the maps, such as a centre or a border that is always bright.",
        "What is bright in every image is a habit of the model and says nothing of the image under it; and a map over "
        "the object is no proof that the answer came from there.",
    ),
    "filters": Caption(
        "Filters of the patches",
        "The principal components of the filters that turn a patch into a token, as images, the strongest first "
        "(figure 7, left, of the ViT paper): the patterns in a patch that a token's numbers differ by most. Of a model "
        "with convolutions before its patches, those of the first one.",
        "A component is a direction that many filters share and no single filter, its sign means nothing, and how much "
        "the layers behind use it is not seen here.",
    ),
    "positions": Caption(
        "Similarity of the positions",
        "For every patch a map of how alike its position embedding is to that of every patch, by their cosine (figure "
        "7, centre, of the ViT paper): neighbours, rows or columns that look alike are a geometry that was learned.",
        "That positions differ does not mean that the model uses them, and how large they are beside the patches that "
        "they are added to is not seen in a cosine.",
    ),
    "distance": Caption(
        "Mean attention distance",
        "How far in the image a patch looks, in pixels from centre to centre, weighted by attention and averaged over "
        "patches and images, for every head of every layer (figure 7, right, of the ViT paper).",
        "A mean hides its spread: a head that looks near and far by turns, one that looks everywhere, and one that "
        "always looks at a corner can have the same distance, and the dashed line is what even attention has.",
    ),
    "entropy": Caption(
        "Entropy of the attention",
        "How widely a token spreads its attention, in bits, averaged over tokens and images: at 0 each looks at one "
        "token only, at the dashed line at all of them evenly.",
        "It says how many tokens are looked at, not which, and a narrow head is not therefore an important one.",
    ),
    "importance": Caption(
        "Importance of the heads",
        "How much the logit of the predicted class would change, to first order, if a head's attention were scaled: "
        "the size of its sum of gradient times attention, averaged over images (Michel et al. 2019).",
        "It is a slope at the model as it is: heads that replace each other when one is removed all look unimportant, "
        "and the numbers of two models with logits of different size cannot be compared, only their pattern.",
    ),
    "lens": Caption(
        "Logit lens",
        "What the model would answer if the layers ended early: the final norm and the head applied to {reader} after "
        "every layer, with the probability of the label and the share of images where the label comes first.",
        "The head was trained for the last layer only, so that a low curve means that the answer is not yet in the "
        "head's language, not that the layer does not know it.",
    ),
    "attribution": Caption(
        "Direct attribution",
        "The logit of the predicted class written as a sum over what the embedding, every head, and every MLP put "
        "into {reader}, with the final norm's scale held fixed, averaged over images (Elhage et al. 2021).",
        "Only the direct way to the logit counts here: a head whose work is read by later layers gets nothing, and "
        "what all classes' logits share is in the numbers though it changes no answer.",
    ),
    "features": Caption(
        "Features as colours",
        "The patches' tokens after the final norm, by their three strongest principal components over these images as "
        "red, green and blue: patches of one colour are alike to the model.",
        "The colours themselves mean nothing and differ between the two models, and three components leave out what "
        "the others hold.",
    ),
    "norms": Caption(
        "Tokens of high norm",
        "The length of the tokens after every layer, and where in the image the long ones are after the last: large "
        "trained models keep global information in a few patches of very high norm (Darcet et al. 2023).",
        "A long token is not an important one, because every layer reads tokens after a norm that takes their length "
        "away, and one that is long only because layers add up is no outlier.",
    ),
    "flow": Caption(
        "Gradient flow",
        "How strongly the logit of the predicted class answers to a small change of the tokens after every layer: the "
        "length of its gradient, averaged over images, for the class token and for a patch.",
        "It is a slope in each token's own units, so that where tokens are longer it is smaller with nothing lost, and "
        "of a model that reads its class token nothing reaches the last layer's patches by construction.",
    ),
}

UNTRAINED = (
    "After each picture comes the same picture of an untrained model: the same settings, with the weights that "
    "their seed draws, as a training run from scratch starts. Its head, which starts at zero and would let no gradient "
    "through, is drawn, too, with a deviation of one over the root of a token's length. What looks the same in both "
    "was not learned: it comes from the architecture, from the image or from the method (Adebayo et al. 2018, “Sanity "
    "checks for saliency maps”)."
)
"""How to read the two beside each other."""
