# The experiment of config.yaml: data -> measurements -> tables -> figures and report.
#   snakemake --cores 2 all        everything
#   snakemake --cores 2 figures    draw again from the tables that are there
#   snakemake --workflow-profile workflow/profiles/slurm all    with the options of a profile
import sys

from snakemake.utils import min_version

min_version("9.20")
sys.path.insert(0, workflow.basedir)


configfile: "config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/measure.smk"
include: "workflow/rules/examine.smk"
include: "workflow/rules/analyse.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        rules.figures.input,
        rules.tables.input,
        rules.page.output,


include: "workflow/rules/again.smk"
