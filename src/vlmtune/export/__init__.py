"""From a trained model to a plain transformers folder. The package itself can be called: see `write.export`."""

from vlmtune.face import make_callable

make_callable(__name__, "vlmtune.export.write:export")
