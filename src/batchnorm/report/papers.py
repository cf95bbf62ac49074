"""The two papers, as charts cite them and in full."""

__all__ = ["P1", "P2", "REFERENCES"]

P1 = "[P1] Ioffe & Szegedy 2015"
P2 = "[P2] Santurkar et al. 2018"

REFERENCES = {
    "P1": "Sergey Ioffe and Christian Szegedy: Batch Normalization: Accelerating Deep Network "
    "Training by Reducing Internal Covariate Shift. 2015. arXiv 1502.03167.",
    "P2": "Shibani Santurkar, Dimitris Tsipras, Andrew Ilyas and Aleksander Mądry: How Does Batch "
    "Normalization Help Optimization? 2018. arXiv 1805.11604.",
}
