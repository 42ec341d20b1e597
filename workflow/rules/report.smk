rule report:
    """summary.csv, the table, the HTML report and its audit page."""
    input:
        card=CARD,
        results=per_result(
            "finetune.json",
            "finetune_curve.csv",
            "attack.json",
            "verdicts.parquet",
            "generate.json",
            "samples.png",
            "chains.gif",
            "energy.json",
            "energy.npz",
            "reliability.json",
            "reliability.png",
        ),
        pretraining=sorted(
            {
                f"{RESULTS}/pretraining/{e.pretraining}/seed{seed}/pretrain.json"
                for e in PROFILE.experiments.values()
                for seed in SEEDS
            }
        ),
        code=CODE["report"],
    output:
        summary=REPORT["summary"],
        metrics=REPORT["metrics"],
        table_csv=REPORT["table_csv"],
        table_md=report(
            REPORT["table_md"],
            caption="../report/table.rst",
            category="Summary",
            labels={"what": "table"},
        ),
        html=report(
            REPORT["html"],
            caption="../report/page.rst",
            category="Summary",
            labels={"what": "whole report"},
        ),
        audit_html=report(
            REPORT["audit_html"],
            caption="../report/audit.rst",
            category="Summary",
            labels={"what": "which claims hold"},
        ),
        audit_md=REPORT["audit_md"],
        journal=REPORT["journal"],
    log:
        f"{LOGS}/report.log",
    benchmark:
        f"{BENCHMARKS}/report.tsv"
    conda:
        "../envs/ebjdat.yaml"
    params:
        settings=SETTINGS,
        sections=sections("experiments", "seeds", "evaluation", "report"),
    shell:
        "python -m ebjdat report {params.settings} --card {input.card} --summary {output.summary}"
        " --metrics {output.metrics} --table-csv {output.table_csv} --table-md {output.table_md} --html {output.html}"
        " --audit-html {output.audit_html} --audit-md {output.audit_md}"
        " > {log} 2>&1"
