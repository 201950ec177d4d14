# Tables: the raw rows of all runs, then what is made of them.

# Where tables lie without runs (results/reference/*), they are given: nothing is measured again.
if not EXPERIMENT.tables_are_given:

    rule list_runs:
        # The names of thousands of files go through a file, not through the command line.
        output:
            "<results>/tables/.{raw}.list",
        log:
            "<results>/logs/list_runs/{raw}.log",
        localrule: True
        params:
            paths=EXPERIMENT.list_run_files,
        run:
            write_text(output[0], params.paths)

    rule combine:
        input:
            runs=EXPERIMENT.run_files,
            list="<results>/tables/.{raw}.list",
        output:
            "<results>/tables/{raw}.csv",
        log:
            "<results>/logs/combine/{raw}.log",
        conda:
            "../envs/cnn.yaml"
        shell:
            "python -m cnnlib combine --table {wildcards.raw} --out {output} --list {input.list}"
            " 2>&1 | tee {log}"


rule tabulate:
    input:
        tables=EXPERIMENT.tables_of_table,
        code=[
            "workflow/tables/{table}.py",
            "workflow/tabulate.py",
            "workflow/wording.py",
        ],
    output:
        csv="<results>/tables/{table}.csv",
        markdown="<results>/tables/{table}.md",
    log:
        "<results>/logs/tabulate/{table}.log",
    conda:
        "../envs/cnn.yaml"
    shell:
        "python -m workflow.tabulate {wildcards.table} --tables {input.tables}"
        " --csv {output.csv} --markdown {output.markdown} 2>&1 | tee {log}"


rule tables:
    input:
        EXPERIMENT.table_files,
