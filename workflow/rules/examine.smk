# Measured beside the runs, once: the machine's own limits, what transfers cost, where CPU stages
# spend their time, what a trained network looks like.

# Where tables are given (results/reference/*), these are among them.
if not EXPERIMENT.tables_are_given:

    rule probe:
        input:
            code=[
                *multiext(
                    "cnnlib/probes/",
                    "__init__.py",
                    "log.py",
                    "chase.py",
                    "cpu.py",
                    "gpu.py",
                ),
                "kernels/probes.cuh",
            ],
        output:
            update("<results>/tables/probes.csv"),
        log:
            "<results>/logs/probe.log",
        conda:
            "../envs/cnn.yaml"
        threads: workflow.resource_settings.cores or 1
        resources:
            timer=1,
            gpu=int(EXPERIMENT.config.sweep.device != "emulated"),
        params:
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.without_wildcards("measuring"),
        shell:
            "python -m workflow.glue.exclusive python -m cnnlib probe"
            " --config {params.config} --out {output} 2>&1 | tee {log}"

    rule pictures:
        input:
            data=EXPERIMENT.dataset_arrays,
            code="cnnlib/measuring/learning_curve.py",
        output:
            update("<results>/tables/pictures.csv"),
        log:
            "<results>/logs/pictures.log",
        conda:
            "../envs/cnn.yaml"
        params:
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.without_wildcards("datasets"),
        shell:
            "python -m cnnlib pictures --config {params.config} --out {output} 2>&1 | tee {log}"

    rule features:
        input:
            data=EXPERIMENT.dataset_arrays,
            sources="<results>/sources/gemm.sha256",
            code="cnnlib/measuring/feature_maps.py",
        output:
            update("<results>/tables/features.csv"),
        log:
            "<results>/logs/features.log",
        conda:
            "../envs/cnn.yaml"
        threads: workflow.resource_settings.cores or 1
        resources:
            timer=1,
        params:
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.without_wildcards("training", "networks"),
        shell:
            "python -m cnnlib features --config {params.config} --out {output} 2>&1 | tee {log}"

    rule race:
        input:
            data=EXPERIMENT.race_data,
            sources="<results>/sources/{stage}.sha256",
            code="cnnlib/measuring/race.py",
        output:
            update("<results>/race/{stage}.csv"),
        log:
            "<results>/logs/race/{stage}.log",
        conda:
            "../envs/cnn.yaml"
        threads: workflow.resource_settings.cores or 1
        resources:
            timer=1,
            gpu=EXPERIMENT.gpus,
        params:
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.race_settings,
        shell:
            "python -m workflow.glue.exclusive python -m cnnlib race --config {params.config}"
            " --stage {wildcards.stage} --data {input.data} --out {output} 2>&1 | tee {log}"

    rule examine:
        # {raw} is the command's name and the table's: transfers or cpu_profile.
        input:
            data="<results>/data/{dataset}.npz",
            sources="<results>/sources/{stage}.sha256",
            code=multiext("cnnlib/measuring/", "cpu_profile.py", "transfers.py"),
        output:
            update("<results>/{raw}/{dataset}/{network}/{stage}.csv"),
        log:
            "<results>/logs/{raw}/{dataset}/{network}/{stage}.log",
        conda:
            "../envs/cnn.yaml"
        threads: workflow.resource_settings.cores or 1
        resources:
            timer=1,
            gpu=EXPERIMENT.gpus,
        params:
            config=EXPERIMENT.settings_file,
            settings=EXPERIMENT.run_settings,
            batch_size=EXPERIMENT.usual_batch_size,
        shell:
            "python -m workflow.glue.exclusive python -m cnnlib {wildcards.raw}"
            " --config {params.config} --dataset {wildcards.dataset}"
            " --network {wildcards.network} --stage {wildcards.stage}"
            " --batch-size {params.batch_size} --data {input.data} --out {output} 2>&1 | tee {log}"
