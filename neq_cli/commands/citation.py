"""What to cite, as `neq --citation` prints it and the README's section shows it: the paper, and this version of neq."""

from __future__ import annotations

from neq_cli import __version__

CITATION = """\
@inproceedings{bragagnolo2022update,
  title     = {To update or not to update? Neurons at equilibrium in deep models},
  author    = {Bragagnolo, Andrea and Tartaglione, Enzo and Grangetto, Marco},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2022}
}

@software{neq,
  title   = {neq: train any PyTorch model and stop updating the neurons that have reached equilibrium},
  author  = {{The neq authors}},
  version = {VERSION}
}
""".replace("VERSION", __version__)
"""BibTeX."""
