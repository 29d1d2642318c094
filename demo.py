"Runs the code of a tutorial notebook from a terminal: `make demo`."
import sys
from pathlib import Path
from time import perf_counter

from fastcore.nbio import read_nb

tutorial = Path(__file__).parent/'nbs'/'tutorials'/f"{sys.argv[1] if len(sys.argv) > 1 else 'fold_learner'}.ipynb"
namespace, start = {'__name__': '__main__'}, perf_counter()
for cell in read_nb(tutorial).cells:
    if cell.cell_type == 'markdown': print(f'\n{cell.source}\n', flush=True)
    elif cell.cell_type == 'code' and '#| eval: false' not in cell.source: exec(compile(cell.source, f'{tutorial.name}:{cell.id}', 'exec'), namespace)
print(f'\nThat took {perf_counter()-start:.0f} seconds.')
