"Random networks, as source code: random wiring, sharing, in-place writes, views, slices, concatenations, ranks, groups, padding, several outputs."
import re

import torch
import torch.nn.functional as F
from torch import nn

from fasterai.fold.verify import run


class Scale(nn.Module):
    "As a LayerScale"
    def __init__(self, c): super().__init__(); self.gamma = nn.Parameter(torch.rand(c, 1, 1) - .3)
    def forward(self, x): return x*self.gamma


class Affine(nn.Module):
    def __init__(self, c): super().__init__(); self.weight, self.bias = nn.Parameter(torch.rand(c, 1, 1) + .2), nn.Parameter(torch.randn(c, 1, 1))
    def forward(self, x): return self.weight*x + self.bias


class Told(nn.Module):
    "Does what its caller says, by an argument or an attribute"
    act = False
    def __init__(self, c): super().__init__(); self.conv, self.bn = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)
    def forward(self, x, act=False):
        y = self.conv(x)
        return self.bn(y.relu() if act or self.act else y)


class Notes(nn.Module):
    "Says whether its input was large"
    large = False
    def forward(self, x):
        if x.shape[2] > 6: self.large = True
        return x*1


class Builder:
    "Writes a network, one random statement at a time; `draw(n)` gives a number below `n`"
    def __init__(self, draw):
        self.draw, self.layers, self.lines, self.vars = draw, {}, [], {'x': ('img', 4, 6)} # name: kind, channels, side
        self.count = 0

    def pick(self, options): return options[self.draw(len(options))]
    def chance(self, percent): return self.draw(100) < percent
    def name(self, prefix): self.count += 1; return f'{prefix}{self.count}'

    def layer(self, prefix, source):
        "A new layer, or sometimes one that is there already"
        same = [n for n, s in self.layers.items() if s == source]
        if same and self.chance(25): return self.pick(same)
        name = self.name(prefix)
        self.layers[name] = source
        return name

    def emit(self, expression, kind, c, side=0):
        name = self.name('v')
        self.lines.append(f'{name} = {expression}')
        self.vars[name] = (kind, c, side)

    def step(self):
        "One more statement"
        v = self.pick([*self.vars][-4:] if self.chance(80) else [*self.vars])
        kind, c, side = self.vars[v]
        getattr(self, kind)(v, c, side)

    def img(self, v, c, side):
        what = self.pick(['conv', 'conv', 'conv', 'bn', 'bn', 'bn', 'bn', 'act', 'module', 'pre', 'pool', 'two', 'two', 'part', 'shape', 'move', 'flat', 'keep', 'branches', 'series', 'ask', 'size', 'scale', 'told'])
        if what == 'conv':
            o, k = self.pick([2, 4, 4, 8]), self.pick([1, 1, 3])
            g, pad = 2 if c % 2 == 0 and self.chance(25) else 1, self.draw(2) if k == 3 or self.chance(10) else 0
            if side < 3: k, pad = 1, 0
            mode = ", padding_mode='reflect'" if pad and self.chance(20) else ''
            if k == 1 and side < 2: mode = ''
            name = self.layer('conv', f'nn.Conv2d({c}, {o}, {k}, padding={pad}, groups={g}, bias={self.chance(50)}{mode})')
            self.emit(f'self.{name}({v})', 'img', o, side - k + 1 + 2*pad)
        elif what == 'bn': self.emit(f"self.{self.layer('bn', f'nn.BatchNorm2d({c}, affine={self.chance(85)})')}({v})", 'img', c, side)
        elif what == 'act': self.emit(f"{self.pick(['torch.relu({v})', '{v}.relu_()', 'F.relu({v}, inplace=True)', 'torch.sigmoid({v})', '{v} * 2', 'self.drop({v})', 'F.dropout({v}, training=self.training)']).format(v=v)}", 'img', c, side)
        elif what == 'module': self.emit(f"self.{self.layer('act', self.pick(['nn.ReLU()', 'nn.ReLU(inplace=True)', 'nn.ReLU6()', 'nn.Hardtanh(-.5, .8)']))}({v})", 'img', c, side)
        elif what == 'pre': # normalised and activated first, then convolved
            act, k = self.pick(['nn.ReLU()', 'nn.ReLU(inplace=True)', 'nn.ReLU6()', 'nn.Hardtanh(-.5, .8)']), 3 if side > 3 and self.chance(30) else 1
            pad = self.draw(2) if k == 3 else 0
            for layer, source in (('bn', f'nn.BatchNorm2d({c})'), ('act', act), ('conv', f'nn.Conv2d({c}, {c}, {k}, padding={pad})')):
                self.emit(f'self.{self.layer(layer, source)}({v})', 'img', c, side - (k - 1 - 2*pad)*(layer == 'conv'))
                v = [*self.vars][-1]
        elif what == 'pool':
            if side >= 4: self.emit(f"{self.pick(['F.avg_pool2d({v}, 2)', 'F.max_pool2d({v}, 2)', 'F.avg_pool2d({v}, 2, count_include_pad=False)']).format(v=v)}", 'img', c, side//2)
            else: self.emit(f"F.interpolate({v}, scale_factor=2, mode='{self.pick(['nearest', 'bilinear'])}')", 'img', c, side*2)
        elif what == 'two': self.two(v, c, side)
        elif what == 'part' and c % 2 == 0:
            a, b = self.name('v'), self.name('v')
            if self.chance(50): self.lines.append(f'{a}, {b} = {v}.chunk(2, 1)')
            else: self.lines += [f'{a} = {v}[:, :{c//2}]', f'{b} = {v}[:, {c//2 if self.chance(80) else c//2 - 1}:][:, :{c//2}]']
            self.vars |= {a: ('img', c//2, side), b: ('img', c//2, side)}
        elif what == 'shape' and c % 4 == 0: self.emit(f"{self.pick(['F.pixel_shuffle({v}, 2)', 'F.pixel_shuffle(F.pixel_shuffle({v}, 2), 1)']).format(v=v)}", 'img', c//4, side*2)
        elif what == 'move': self.emit(f"{self.pick(['{v}.flip(3)', '{v}.transpose(2, 3)', '{v}.contiguous()', '{v}.clone()', '{v}.flatten(2).view({v}.shape)', 'F.channel_shuffle({v}, %d)' % (2 if c % 2 == 0 else 1)]).format(v=v)}", 'img', c, side)
        elif what == 'flat':
            kind = self.pick(['mean', 'flatten', 'seq'])
            if kind == 'mean': self.emit(f'{v}.mean((2, 3))', 'vec', c)
            elif kind == 'flatten' and c*side*side <= 512: self.emit(f'{v}.flatten(1)', 'vec', c*side*side)
            else: self.emit(f'{v}.flatten(2).transpose(1, 2)', 'seq', c, side*side)
        elif what == 'branches': self.branches(v, c, side)
        elif what == 'series':
            o = self.pick([2, 4])
            a, b = self.layer('conv', f'nn.Conv2d({c}, 4, {(k := self.pick([1, 3]))}, padding={k//2}, groups={2 if c % 2 == 0 and self.chance(30) else 1})') if side > 2 else None, self.layer('conv', f'nn.Conv2d(4, {o}, 1)')
            if a: self.lines.append(f"{self.name('v')} = F.avg_pool2d(self.{a}({v}), 3, 1, 1, count_include_pad=False)"); self.emit(f'self.{b}(v{self.count})', 'img', o, side)
        elif what == 'ask': self.emit(self.pick(['{v} * {v}.shape[1]', '{v} * ({v}.dim() + {v}.size(1))', '{v} + torch.ones_like({v})', '{v} + {v}']).format(v=v), 'img', c, side)
        elif what == 'size': self.size(v, c, side)
        elif what == 'told': self.told(v, c, side)
        elif what == 'scale': self.emit(f"self.{self.layer('scale', self.pick([f'Scale({c})', f'Affine({c})', f'nn.GroupNorm(1, {c})', f'nn.InstanceNorm2d({c}, affine=True)']))}({v})", 'img', c, side)
        elif what == 'keep' and self.chance(30): self.lines.append(f'kept.append({v})')

    def size(self, v, c, side):
        "What may do something else at another size, or another time"
        if self.chance(50): self.emit(self.pick(['{v} if {v}.shape[2] < 7 else {v}.tanh()', '{v}[:, :, :{side}, :{side}]', '{v}.relu() if torch.is_grad_enabled() else {v}', 'F.pad({v}, (0, {v}.shape[2]//7))']).format(v=v, side=side), 'img', c, side)
        else: self.emit(self.pick(['{v}.view(-1, {c}, {n}).mean(2)', 'F.avg_pool2d({v}, {side}).view(-1, {c})', 'F.avg_pool2d({v}, {v}.shape[2:]).flatten(1)', '{v}.view({v}.shape[0], -1)[:, :{c}]', '{v}.flatten(2)[..., :{side}].mean(2)', 'F.adaptive_avg_pool2d({v}, 1).view(-1, {c})']).format(v=v, c=c, side=side, n=side*side), 'vec', c)

    def told(self, v, c, side):
        "A child that is told what to do, always or at some sizes, or is asked what it did"
        if self.chance(10):
            notes = self.layer('notes', 'Notes()')
            return self.emit(f'self.{notes}({v}) if self.{notes}.large else self.{notes}({v}).tanh()', 'img', c, side)
        name = self.layer('told', f'Told({c})')
        how = self.pick(['{m}({v}, True)', '{m}({v})', '{m}({v}, {v}.shape[2] < 7)', '{m}({v}) if {v}.shape[2] < 7 else {m}({v}, True)'])
        if self.chance(10): self.lines.append(f'self.{name}.act = {self.pick(["True", "x.shape[2] > 6", "True if x.shape[2] > 6 else False"])}')
        self.emit(how.format(m=f'self.{name}', v=v), 'img', c, side)

    def two(self, v, c, side):
        others = [n for n, o in self.vars.items() if o[0] == 'img' and o[2] == side]
        same = [n for n in others if self.vars[n][1] == c]
        if self.chance(35): n = self.pick(others); self.emit(f'torch.cat([{v}, {n}], 1)', 'img', c + self.vars[n][1], side)
        else: n = self.pick(same); self.emit(f"{self.pick(['{v} + {n}', '{v} - {n}', '{v}.add_({n})' if v != 'x' else '{v} + {n}', '{v} * {n}']).format(v=v, n=n)}", 'img', c, side)

    def branches(self, v, c, side):
        "Layers beside each other, and their sum"
        branch = {3: "self.{}({v})".format(self.layer('conv', f'nn.Conv2d({c}, {c}, 3, padding=1, bias={self.chance(50)}, groups={self.pick([1, c])})'), v=v),
                  1: "self.{}({v})".format(self.layer('conv', f'nn.Conv2d({c}, {c}, 1, padding={self.draw(2) if self.chance(10) else 0}, groups={self.pick([1, c])})'), v=v), 0: "self.{}({v})".format(self.layer('bn', f'nn.BatchNorm2d({c})'), v=v), 2: v}
        terms = [branch[self.pick([3, 1, 0, 3, 1, 2])] for _ in range(2 + self.draw(2))]
        if 'padding=1' in self.layers.get(branch[1][5:].split('(')[0], ''): terms = [t for t in terms if t != branch[1]] or [v]
        if len(terms) > 1 and self.chance(30): terms = [f'{terms[0]}.add_({terms[1]})' if terms[0] != v else f'{terms[1]} + {v}', *terms[2:]]
        self.emit(f'sum([{", ".join(terms)}])' if self.chance(20) else ' + '.join(terms), 'img', c, side)

    def vec(self, v, c, _):
        what = self.pick(['linear', 'linear', 'bn', 'bn', 'act', 'cat'])
        if what == 'linear': o = self.pick([2, 4, 8]); self.emit(f"self.{self.layer('fc', f'nn.Linear({c}, {o}, bias={self.chance(50)})')}({v})", 'vec', o)
        elif what == 'bn': self.emit(f"self.{self.layer('bn', f'nn.BatchNorm1d({c})')}({v})", 'vec', c)
        elif what == 'act': self.emit(f"{self.pick(['torch.relu({v})', '{v}.tanh()', 'self.drop({v})']).format(v=v)}", 'vec', c)
        else: n = self.pick([n for n, o in self.vars.items() if o[0] == 'vec']); self.emit(f'torch.cat([{v}, {n}], 1)', 'vec', c + self.vars[n][1])

    def seq(self, v, c, t):
        what = self.pick(['linear', 'linear', 'bn', 'bn_t', 'act', 'mean', 'rows'])
        if what == 'linear': o = self.pick([2, 4, t]); self.emit(f"self.{self.layer('fc', f'nn.Linear({c}, {o}, bias={self.chance(50)})')}({v})", 'seq', o, t)
        elif what == 'bn': self.emit(f"self.{self.layer('bn', f'nn.BatchNorm1d({c})')}({v}.transpose(1, 2)).transpose(1, 2)", 'seq', c, t)
        elif what == 'bn_t': self.emit(f"self.{self.layer('bn', f'nn.BatchNorm1d({t})')}({v})", 'seq', c, t) # over the positions
        elif what == 'act': self.emit(f'F.gelu({v})', 'seq', c, t)
        elif what == 'mean': self.emit(f'{v}.mean(1)', 'vec', c)
        else: self.emit(f"self.{self.layer('bn', f'nn.BatchNorm1d({c})')}({v}.flatten(0, 1)).reshape_as({v})", 'seq', c, t)

    def source(self):
        outs = [*self.vars][-1 - self.draw(3):] if self.chance(60) else [*self.vars][-1:]
        weighty = [n for n, s in self.layers.items() if not re.search('affine=False|ReLU|Hardtanh|Scale|Told|Notes', s)]
        if self.chance(10) and weighty: self.lines.append(f'kept.append(self.{self.pick(weighty)}.weight.sum())')
        layers = '\n'.join(f'        self.{n} = {s}' for n, s in self.layers.items())
        lines = '\n'.join(f'        {l}' for l in self.lines)
        return f"class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.drop = nn.Dropout()\n{layers}\n    def forward(self, x):\n        kept = []\n{lines}\n        return {', '.join(outs)}, kept\n"


def random_network(draw, steps=14):
    "The source of a random network that takes `[N, 4, 6, 6]`"
    b = Builder(draw)
    for _ in range(3 + draw(steps)): b.step()
    return b.source()


def outputs(model, inputs):
    "What `model` gives for each input, `None` where it fails: it was made for one size, or writes into what overlaps itself"
    def one(x):
        try: return run(model, (x.clone(),), {})
        except (RuntimeError, ValueError): return None
    return [one(x) for x in inputs]


def build(source):
    "The network that `source` describes"
    space = dict(nn=nn, torch=torch, F=F, Scale=Scale, Affine=Affine, Told=Told, Notes=Notes)
    exec(source, space)
    net = space['Net']()
    for m in net.modules():
        if isinstance(m, (nn.GroupNorm, nn.InstanceNorm2d)): nn.init.uniform_(m.weight, -1, 1), nn.init.normal_(m.bias)
    return net
