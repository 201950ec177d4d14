# Tables: the raw rows of all runs, then what is made of them.

# Each raw table and the files whose rows it holds, in the order of the sweep.
ROWS = {
    **{
        raw: collect(
            "<results>/runs/{run}/{raw}.csv", run=EXPERIMENT.run_names, raw=raw
        )
        for raw in RUN_TABLES
    },
    "transfers": collect(
        "<results>/transfers/{pair}/{stage}.csv",
        pair=EXPERIMENT.pairs,
        stage=EXPERIMENT.stages_on("cuda"),
    ),
    "cpu_profile": collect(
        "<results>/cpu_profile/{pair}/{stage}.csv",
        pair=EXPERIMENT.pairs,
        stage=EXPERIMENT.stages_on("cpu"),
    ),
    "race": collect("<results>/race/{stage}.csv", stage=EXPERIMENT.raced),
}

# Where tables lie without runs (results/reference/*), they are given: nothing is measured again.
if not EXPERIMENT.tables_are_given:

    rule combine:
        input:
            lambda wildcards: ROWS[wildcards.raw],
        output:
            update("<results>/tables/{raw}.csv"),
        log:
            "<results>/logs/combine/{raw}.log",
        wildcard_constraints:
            raw="|".join(ROWS),
        conda:
            "../envs/cnn.yaml"
        params:
            # The names of thousands of files go through a file, not through the command line.
            list=EXPERIMENT.list_file("{raw}"),
        shell:
            "python -m cnnlib combine --table {wildcards.raw} --out {output} --list {params.list}"
            " 2>&1 | tee {log}"


rule tabulate:
    input:
        tables=lambda wildcards: collect(
            "<results>/tables/{name}.csv",
            name=EXPERIMENT.tables_read("tables", wildcards.table),
        ),
        code=code_of("workflow/glue/tabulate.py", "workflow/tables/{table}.py"),
    output:
        csv=update("<results>/tables/{table}.csv"),
        markdown=update("<results>/tables/{table}.md"),
    log:
        "<results>/logs/tabulate/{table}.log",
    conda:
        "../envs/cnn.yaml"
    params:
        own_stages=EXPERIMENT.own_stages,
    shell:
        "python -m workflow.glue.tabulate {wildcards.table} --tables {input.tables}"
        " --csv {output.csv} --markdown {output.markdown} 2>&1 | tee {log}"


rule tables:
    input:
        collect(
            "<results>/tables/{table}.{kind}",
            table=EXPERIMENT.wanted_tables,
            kind=["csv", "md"],
        ),
