"""The workflow as Python functions, one module per command; the command line is a thin layer over them.

result = msd.find_stages("digits", out=Path("stages.json"))
run = msd.train(msd.preset("digits"), Path("runs/digits"), result=result)
images = msd.sample(run, count=64)
scores = msd.evaluate(run)
msd.report(run)
"""
