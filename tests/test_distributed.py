"A real training run of two processes (gloo, on this machine), folded in each of them: they agree, and with the unfolded network."
import os

import pytest, torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fasterai.fold.verify import difference
from fasterai.misc.bn_folding import BN_Folder, unwrapped
from helpers import norms

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason='this PyTorch has no gloo')


def trained(rank, sync):
    "A DistributedDataParallel after a few steps, each process on data of its own"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    model = DistributedDataParallel(model)
    opt = torch.optim.SGD(model.parameters(), .1)
    g = torch.Generator().manual_seed(rank)
    for _ in range(5):
        x = torch.randn(8, 3, 8, 8, generator=g)*(1 + rank)
        nn.functional.cross_entropy(model(x), torch.randint(0, 2, (8,), generator=g)).backward()
        opt.step()
        opt.zero_grad()
    if sync: model.module = nn.SyncBatchNorm.convert_sync_batchnorm(model.module) # a SyncBatchNorm trains on GPUs alone
    return model.eval()


def gathered(t):
    "`t` of every process"
    ts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(ts, t.contiguous())
    return ts


def joined(rank, store, backend='gloo'):
    "Join the other process: they meet in a file, which no third one can take from them, as it could a free port"
    dist.init_process_group(backend, init_method=f'file://{store}', rank=rank, world_size=2)


def left():
    "Leave, each once the other is done too, and end the process: a thread of gloo's that outlives Python aborts it, now and then"
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


@pytest.fixture
def store(tmp_path): return tmp_path/'store'


def work(rank, store, sync):
    joined(rank, store)
    torch.set_num_threads(1)
    model, x, bn = trained(rank, sync), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9)), BN_Folder()
    model(x) # gives every process the statistics of the first, as any forward does
    want = model(x).detach()
    for xs in ((), (x,)):
        new = bn.fold(model, *xs)
        assert type(new) is type(model) and bn.report.folded == 2 and not norms(new) and len(norms(model)) == 2
        assert difference(want, new(x)).relative < 1e-5
        for p in new.parameters():
            first, second = gathered(p.detach())
            assert torch.equal(first, second)
        if rank == 0: BN_Folder().fold(unwrapped(model), x) # one process alone: nothing waits for the other
    new.train()(x*(1 + rank)).sum().backward() # trained on, the processes still share gradients, those of a bias that is new too
    for p in new.parameters():
        first, second = gathered(p.grad)
        assert torch.equal(first, second)
    with pytest.raises(ValueError, match='fold `model.module`'): bn.fold(model, inplace=True)
    left()


@pytest.mark.parametrize('sync', [False, True], ids=['BatchNorm', 'SyncBatchNorm'])
def test_two_processes(sync, store):
    mp.spawn(work, args=(store, sync), nprocs=2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices: a SyncBatchNorm trains on GPUs alone')
def test_sync_batchnorm_trained(store):
    mp.spawn(work_cuda, args=(store,), nprocs=2)


def work_cuda(rank, store):
    joined(rank, store, 'nccl')
    torch.manual_seed(0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).to(rank)
    model = DistributedDataParallel(model, device_ids=[rank])
    for _ in range(3): model(torch.randn(4, 3, 8, 8, device=rank)*(1 + rank)).mean().backward()
    x, bn = torch.ones(2, 3, 8, 8, device=rank), BN_Folder()
    new = bn.fold(model.eval(), x)
    assert bn.report.folded == 1 and difference(model(x), new(x)).relative < 1e-5
    first, second = gathered(new.module[0].weight.detach())
    assert torch.equal(first, second.to(first.device))
    left()


def sharded(rank, store):
    joined(rank, store)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    model, bn = fully_shard(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), mesh=init_device_mesh('cpu', (2,))), BN_Folder()
    for xs in ((), (torch.randn(1, 3, 8, 8),)):
        with pytest.raises(ValueError, match='holds its parameters in shards: gather them first'): bn.fold(model, *xs)
    plain.load_state_dict({k: v.full_tensor() if hasattr(v, 'full_tensor') else v for k, v in model.state_dict().items()})
    bn.fold(plain)
    assert bn.report.folded == 1
    left()


def test_sharded_parameters(store):
    pytest.importorskip('torch.distributed.fsdp', reason='this PyTorch has no FSDP')
    if not hasattr(torch.distributed.fsdp, 'fully_shard'): pytest.skip('this PyTorch has no `fully_shard`')
    mp.spawn(sharded, args=(store,), nprocs=2)
