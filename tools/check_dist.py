"Installs the built wheel and sdist, each into an empty environment without dependencies, and imports every module's source."
import subprocess, sys, tempfile, venv
from pathlib import Path

root = Path(__file__).parent.parent
built = sorted((root/'dist').iterdir())
assert {f.suffix for f in built} == {'.whl', '.gz'}, built
here = next(p for p in sys.path if p.endswith('site-packages')) # torch and fastai are borrowed from here: only fasterai itself is on trial
for file in built:
    with tempfile.TemporaryDirectory() as d:
        venv.create(d, with_pip=True)
        python = Path(d)/'bin'/'python'
        subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--no-deps', file], check=True)
        code = (f"import sys; sys.path.append({here!r}); import fasterai; from fasterai.misc.all import BN_Folder; "
                f"assert fasterai.__file__.startswith({d!r}), fasterai.__file__; print(fasterai.__version__)")
        out = subprocess.run([python, '-I', '-c', code], check=True, capture_output=True, text=True, cwd=d)
        print(f'{file.name}: imports, version {out.stdout.strip()}')
