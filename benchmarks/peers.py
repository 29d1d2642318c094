"""What a user would pick instead, on the same networks: right, wrong or crashed, and how many BatchNorms are gone.

    python benchmarks/peers.py                  # some small networks
    python benchmarks/peers.py --only resnet    # a part of the zoo
    python benchmarks/peers.py --all            # all of it

Each network has random weights and statistics. The folded one is run on one example beside the original, in float64 (where a peer has only float32, in that), and the BatchNorms
that run are counted in both, so that one that became a function call or was traced through still counts."""
import argparse, copy, json, os, subprocess, sysconfig, tempfile, venv
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from fastprogress import progress_bar
from torch import nn
from torch.utils._pytree import tree_leaves

from common import build, cast, here, limit, load, observe, randomise, results, save
from fasterai.fold.verify import aligned, difference
from fasterai.misc.bn_folding import BN_Folder
from networks import zoo

some = '''test_resnet test_byobnet test_efficientnet test_coatnet levit_128s repghostnet_050 xcit_nano_12_p8_224 hrnet_w18_small mobilenetv3_small_050 efficientvit_b0 lcnetv2_small resnetv2_18
starnet_s050 fastvit_t8 inception_next_atto regnetx_002 ghostnet_050 visformer_tiny resnet18 resnet50 densenet121 googlenet mobilenet_v3_small efficientnet_b0 shufflenet_v2_x0_5
lraspp_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn'''.split()
convs, batchnorms = (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def ours(model, args): return BN_Folder().fold(model, *args)
def ours_without(model, args): return BN_Folder().fold(model)
def ours_merged(model, args): return BN_Folder(reparameterize=True).fold(model, *args)


def fx(model, args):
    from torch.fx.experimental.optimization import fuse
    return fuse(model)


def fuse_siblings(module):
    "The recipe that is passed around: a BatchNorm and the convolution that was declared before it, container by container"
    from torch.nn.utils.fusion import fuse_conv_bn_eval
    names = list(module._modules)
    for a, b in zip(names, names[1:]):
        if isinstance(module._modules[a], convs) and isinstance(module._modules[b], batchnorms):
            module._modules[a], module._modules[b] = fuse_conv_bn_eval(module._modules[a], module._modules[b]), nn.Identity()
    for child in module.children(): fuse_siblings(child)
    return module


def siblings(model, args): return fuse_siblings(copy.deepcopy(model))


def ao(model, args):
    "`torch.ao.quantization.fuse_modules`, which wants to be given the names: those of siblings of the types that it knows"
    from torch.ao.quantization import fuse_modules
    from torch.ao.quantization.fuser_method_mappings import get_fuser_method
    pairs = []
    for path, m in model.named_modules():
        names = list(m._modules)
        for a, b in zip(names, names[1:]):
            if isinstance(m._modules[a], (*convs, nn.Linear)) and isinstance(m._modules[b], batchnorms) and known(get_fuser_method, m._modules[a], m._modules[b]):
                pairs.append([f'{path}.{n}'.lstrip('.') for n in (a, b)])
    return fuse_modules(model, pairs) if pairs else model


def known(fuser, a, b):
    "Has `fuse_modules` something for this pair of types?"
    try: return fuser((type(a), type(b))) is not None
    except (NotImplementedError, AssertionError): return False


def timm_reparameterize(model, args):
    from timm.utils import reparameterize_model
    return reparameterize_model(model)


in_eager = {'ours, with an example': ours, 'ours, without': ours_without, 'ours, reparameterize=True': ours_merged, 'torch.fx fuse': fx, 'siblings, fuse_conv_bn_eval': siblings, 'torch.ao fuse_modules': ao, 'timm reparameterize_model': timm_reparameterize}
old, onnx = 'fasterai 0.4.1', 'torch.onnx + onnxruntime'


def attempt(job, *args):
    try: return job(*args)
    except ImportError as e: return dict(absent=str(e))
    except Exception as e: return dict(crashed=f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"[:200])


def judged(want, got, limit=limit):
    "How far `got` is from `want`, both from `observe`: right, if not the outputs then the places agree, since a detector sorts equal scores another way"
    def apart(a, b):
        try: return difference(a, b).relative
        except ValueError: return float('inf') # of other shapes
    error = min(apart(want[0], got[0]), apart(want[1], got[1]) if want[1] else float('inf'))
    return dict(right=error < limit, error=error, removed=want[2] - got[2], total=want[2])


def eager(peer, model, args, want, places):
    "What a peer makes of a network in float64, or in float32 where it knows only that"
    try: return judged(want, observe(peer(model, args), args, places))
    except Exception:
        if peer in (ours, ours_without, ours_merged): raise
        model, args = copy.deepcopy(model).float(), cast(args, torch.float32)
        return dict(judged(observe(model, args, places), observe(peer(model, args), args, places), limit=1e-4), dtype='float32')


def by_onnx(source, name, total):
    "BatchNormalization nodes left by PyTorch's exporter, without its optimiser and with it, and then by onnxruntime. One that onnxruntime made a depthwise Conv of its own is not gone"
    import logging, onnx as onnx_format, onnxruntime
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(3)
    model, args = build(source, name)
    model, count = randomise(model), lambda nodes, *ops: sum(n.op_type in ops for n in nodes)
    with tempfile.TemporaryDirectory() as d, torch.no_grad():
        def session(level):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level, options.optimized_model_filepath = level, f'{d}/out.onnx'
            return onnxruntime.InferenceSession(f'{d}/net.onnx', options, providers=['CPUExecutionProvider']), onnx_format.load(f'{d}/out.onnx', load_external_data=False).graph.node
        program = torch.onnx.export(model, args, dynamo=True, optimize=False, verbose=False)
        exported = count(program.model.graph, 'BatchNormalization')
        program.optimize()
        optimised = count(program.model.graph, 'BatchNormalization')
        program.save(f'{d}/net.onnx')
        _, before = session(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED) # all but the layout of this processor
        best, after = session(onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
        made = count(after, 'Conv', 'FusedConv') - count(before, 'Conv', 'FusedConv')
        out = [torch.from_numpy(o) for o in best.run(None, {i.name: x.numpy() for i, x in zip(best.get_inputs(), tree_leaves(args))})]
        return dict(judged((*observe(model, args)[:2], total), (out, [], count(after, 'BatchNormalization') + made), limit=1e-4), exported=exported, exported_and_optimised=optimised, made_convolutions=made)


@contextmanager
def fasterai_041(env=here/'.peers'):
    "A function that asks fasterai 0.4.1, which lives in an environment of its own; PyTorch and the networks come from this one"
    python, ready = env/'bin'/'python', env/'ready'
    if not ready.exists():
        venv.create(env, with_pip=True, clear=True)
        done = subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--no-deps', 'fasterai==0.4.1'], capture_output=True, text=True)
        if done.returncode:
            yield lambda *a: dict(absent=f'pip install fasterai==0.4.1 failed: {done.stderr.strip()[-200:]}')
            return
        theirs = sysconfig.get_path('purelib', vars=dict(base=str(env), platbase=str(env)))
        import timm, torchvision
        (Path(theirs)/'others.pth').write_text('\n'.join(sorted({str(Path(m.__file__).parent.parent) for m in (torch, timm, torchvision)})))
        ready.touch()
    def started():
        child = subprocess.Popen([python, here/'old_fasterai.py'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'})
        if not child.stdout.readline(): raise SystemExit('old_fasterai.py does not start') # which says nothing of what it would have made of a network
        return child
    with tempfile.TemporaryDirectory() as d:
        child = started()
        def ask(source, name, want, places):
            nonlocal child
            if child.poll() is not None: child = started()
            print(json.dumps([source, name, places, f'{d}/out']), file=child.stdin, flush=True)
            answer = child.stdout.readline()
            if not answer: return dict(crashed='the process ended')
            return json.loads(answer) or judged(want, torch.load(f'{d}/out', weights_only=False))
        yield ask
        child.stdin.close()
        child.wait()


def measure(source, name, peers, ask):
    "One network and all the peers"
    model, args = build(source, name)
    model, args = randomise(model).double(), cast(args, torch.float64)
    places = BN_Folder().plan(model, *args).plan.places if isinstance(args[0], list) else []
    want, found = observe(model, args, places), {}
    for peer in peers:
        if peer == old: found[peer] = attempt(ask, source, name, want, places)
        elif peer == onnx: found[peer] = attempt(by_onnx, source, name, want[2])
        else: found[peer] = attempt(eager, in_eager[peer], model, args, want, places)
    return found


def state(r): return next((s for s in ('absent', 'crashed') if s in r), 'right' if r.get('right') else 'wrong')


def cell(r): return f"{r['removed']}/{r['total']}{'' if r['right'] else ' WRONG'}" if 'right' in r else state(r)


def table(found, peers):
    "A line a network, then the sums: BatchNorms removed count where the outputs are right"
    rows = [('', *peers)] + [(name, *(cell(r[p]) if p in r else '' for p in peers)) for name, r in found.items()]
    totals = {p: [r[p] for r in found.values() if p in r] for p in peers}
    for what in ('right', 'wrong', 'crashed', 'absent'): rows.append((what, *(str(sum(state(r) == what for r in totals[p])) for p in peers)))
    everything = {name: max(r.get('total', 0) for r in rs.values()) for name, rs in found.items()}
    rows.append(('removed and right', *(f"{sum(r['removed'] for r in totals[p] if r.get('right'))}/{sum(n for name, n in everything.items() if p in found[name])}" for p in peers)))
    return aligned(rows)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--only', default='', help='networks of the zoo whose name contains this')
    p.add_argument('--sources', default='', help='of these alone, as in timm,torchvision')
    p.add_argument('--all', action='store_true', help='the whole zoo')
    p.add_argument('--peers', default='', help='those whose name contains this')
    p.add_argument('--again', action='store_true', help='measure what was measured before, too')
    p.add_argument('--out', default=str(results/'peers.json'))
    a = p.parse_args()
    peers = [p for p in (*in_eager, old, onnx) if a.peers in p]
    networks = [n for n in zoo() if a.only in n['name'] and (not a.sources or n['source'] in a.sources.split(',')) and (a.all or a.only or n['name'] in some)]
    found = load(a.out)
    with fasterai_041() as ask:
        for n in progress_bar(networks):
            seen = found.setdefault(f"{n['source']}/{n['name']}", {})
            seen |= measure(n['source'], n['name'], [p for p in peers if a.again or p not in seen], ask)
            save(a.out, networks=found)
    mine = {k: found[k] for k in (f"{n['source']}/{n['name']}" for n in networks)}
    print(table(mine, peers))
    for (peer, why), n in Counter((p, r[p].get('crashed') or r[p].get('absent')) for r in mine.values() for p in peers if not 'right' in r[p]).items(): print(f'{n:4} {peer}: {why}')


if __name__ == '__main__': main()
