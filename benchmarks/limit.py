"""The least that a folded network can cost: the same one, written with no `nn.Identity` and no call of one.

Sequentials lose their Identities, and those of one module become that module. In every other class, `self.bn1(x)` becomes `x` in the source of its methods."""
import ast, copy, inspect, textwrap
from types import MethodType

from torch import nn


class _Without(ast.NodeTransformer):
    "`self.name(x)` becomes `x`, and it is not None"
    def __init__(self, names): self.names = names

    def visit_Call(self, node):
        self.generic_visit(node)
        return node.args[0] if _of_self(node.func) in self.names and len(node.args) == 1 and not node.keywords else node

    def visit_Compare(self, node):
        if _of_self(node.left) in self.names and ast.unparse(node.comparators[0]) == 'None': return ast.Constant(isinstance(node.ops[0], ast.IsNot))
        return self.generic_visit(node)


def _of_self(node): return node.attr if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'self' else None
def _mentions(tree): return {_of_self(n) for n in ast.walk(tree)} - {None}


def _methods(kind):
    "`forward` and the methods that it calls, with their sources"
    found, todo = {}, ['forward']
    while todo:
        if (name := todo.pop()) in found or not inspect.isfunction(f := inspect.unwrap(getattr(kind, name, None))): continue
        found[name] = f, ast.parse(textwrap.dedent(inspect.getsource(f)))
        todo += _mentions(found[name][1])
    return found


def _rewritten(m, gone):
    "New methods for `m`, and which of the names in `gone` they do without"
    trees = _methods(type(m))
    new = {name: (f, ast.fix_missing_locations(_Without(gone).visit(copy.deepcopy(tree)))) for name, (f, tree) in trees.items() if _mentions(tree) & gone}
    return new, gone - set().union(*(_mentions(tree) for _, tree in new.values()))


def _method(m, name, f, tree):
    "Compile `tree` where `f` was written, bound to `m`"
    tree.body[0].decorator_list, space = [], dict(f.__globals__)
    exec(compile(tree, inspect.getsourcefile(f), 'exec'), space)
    return MethodType(space[name], m)


def without_identities(model):
    "A copy of `model` with as few Identities as can be"
    new = copy.deepcopy(model)
    for m in list(new.modules()):
        for name, child in m.named_children():
            while type(child) is nn.Sequential and (kept := [c for c in child if type(c) is not nn.Identity]) and len(kept) == 1: child = kept[0]
            m._modules[name] = child
        gone = {n for n, c in m._modules.items() if type(c) is nn.Identity}
        if not gone: continue
        if isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward: can = gone
        else:
            methods, can = _rewritten(m, gone)
            if can != gone: methods, can = _rewritten(m, can)
            for name, (f, tree) in methods.items(): setattr(m, name, _method(m, name, f, tree))
        for n in can: del m._modules[n]
    return new


def identities(model): return sum(type(m) is nn.Identity for m in model.modules())
