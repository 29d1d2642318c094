"Fold BatchNorm into the layers beside it"
from importlib.metadata import version

__version__ = version('fasterai')
