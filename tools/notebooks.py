"Runs every notebook, tutorials too, and saves what it shows; what it warns of is left out."
import json, subprocess, sys
from pathlib import Path

nbs = Path(__file__).parent.parent/'nbs'
only = sys.argv[1:]
for path in sorted(nbs.rglob('*.ipynb')):
    if '.ipynb_checkpoints' in path.parts or only and not any(o in path.name for o in only): continue
    print(path.relative_to(nbs), flush=True)
    subprocess.run([Path(sys.executable).parent/'nbdev-test', '--save', path.name], cwd=path.parent, check=True)
    nb = json.loads(path.read_text())
    for cell in nb['cells']:
        if 'outputs' in cell: cell['outputs'] = [o for o in cell['outputs'] if o.get('name') != 'stderr']
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + '\n')
subprocess.run([Path(sys.executable).parent/'nbdev-clean'], cwd=nbs.parent, check=True)
