"""fasterai 0.4.1 from the package index, in an environment of its own: it has this package's name. Started by `peers.py`.

It reads a line of JSON for a network and answers with one; what the folded network gave is in the file that was asked for."""
import json, os, sys

import torch

from common import build, cast, observe, randomise


def fold(source, name, places, out):
    "Fold one network and run it"
    from fasterai import __version__
    from fasterai.misc.bn_folding import BN_Folder
    if __version__ != '0.4.1': return dict(absent=f'fasterai {__version__} was imported instead')
    model, args = build(source, name)
    try: torch.save(observe(BN_Folder().fold(randomise(model).double()), cast(args, torch.float64), places), out)
    except Exception as e: return dict(crashed=f'{type(e).__name__}: {e}'[:200])
    return {}


def main():
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1) # whatever a network prints while it is built
    print('ready', file=answers, flush=True)
    for line in sys.stdin: print(json.dumps(fold(*json.loads(line))), file=answers, flush=True)


if __name__ == '__main__': main()
