"""Training. The package itself can be called: see `run.train`."""

from vlmtune.face import make_callable

make_callable(__name__, "vlmtune.train.run:train")
