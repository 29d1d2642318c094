"A Python module beside the tests, for what a model imports as it runs or asks by a name that it computes."
from torch import Tensor

n = 0

def norm(bn, y, x): return bn(y) if type(x) is not Tensor else y

def step():
    global n
    n += 1
    return n
