"""The looks of every page and the few lines of script that its legend and its sliders need."""

CSS = """
:root { color-scheme: light; --ink: #1b2733; --soft: #5b6875; --line: #dde3e9; --back: #f5f7f9; --card: #fff; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 32px 0 12px; font-size: 18px; }
/* The heading shares its line with the plot's toolbar. */
h3 { margin: 0 0 -24px; padding-right: 110px; font-size: 14px; font-weight: 600; }
p { margin: 4px 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-weight: 400; }
.note { margin-top: 16px; padding: 8px 14px; background: #fff6e0; border-left: 4px solid #e69f00; border-radius: 4px; }
.cards { display: grid; gap: 12px; margin-top: 20px; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); }
.card { padding: 12px 16px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.card b { display: block; font-size: 24px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
.panels { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); }
.panel, .scroll { min-width: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.panel { margin: 0; padding: 12px 14px 6px; }
.legend { position: sticky; top: 0; z-index: 5; display: flex; flex-wrap: wrap; gap: 6px; align-items: center;
  max-height: 30vh; overflow-y: auto; margin: 0 -4px 12px; padding: 8px 4px; background: var(--back); }
.legend button { display: inline-flex; gap: 8px; align-items: center; max-width: 100%;
  padding: 5px 12px; cursor: pointer; color: var(--ink);
  background: var(--card); border: 1px solid var(--line); border-radius: 16px; font: inherit;
  font-size: 13px; text-align: left; overflow-wrap: anywhere; }
.legend button[aria-pressed=false] { opacity: .45; text-decoration: line-through; }
.legend span { font-size: 13px; }
.legend svg, th svg { flex: none; vertical-align: middle; }
.slider { position: sticky; top: 0; z-index: 5; display: block; margin: 16px -4px 4px; padding: 8px 4px;
  background: var(--back); font-size: 13px; }
.part + .part { margin-top: 28px; }
.part .soft, .part + .soft { margin: 8px 0 12px; font-size: 13px; }
.slider input { display: block; width: 100%; max-width: 640px; height: 24px; margin: 2px 0 0; cursor: pointer; }
.slider output { font-weight: 600; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 600; line-height: 1.3; vertical-align: bottom; }
tbody th { font-weight: 500; overflow-wrap: anywhere; }
.numbers td { white-space: nowrap; }
.numbers td.words { min-width: 150px; white-space: normal; }
.numbers thead th { min-width: 74px; overflow-wrap: anywhere; }
.scroll + p { margin-top: 8px; font-size: 13px; }
.numbers tbody th { min-width: 220px; }
.facts { table-layout: fixed; }
.facts th { width: 38%; }
.facts td { overflow-wrap: anywhere; white-space: pre-wrap; }
.facts td div { max-height: 12em; overflow-y: auto; }
.columns { display: grid; gap: 0 20px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.columns > * { min-width: 0; }
details { margin-top: 24px; }
summary { cursor: pointer; font-weight: 600; margin-bottom: 8px; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
@media (max-width: 600px) {
  main { padding: 16px 12px 32px; }
  h1 { font-size: 21px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 8px; }
  .card { padding: 8px 12px; }
  .card b { font-size: 20px; }
  th, td { padding: 5px 10px; }
  .numbers tbody th { min-width: 120px; }
}
@media print { .legend { position: static; } body { background: #fff; } }
"""

# A slider shows another layer in all its plots: it copies the columns `NAME-INDEX` of their one source to `NAME`.
_SLIDER_SCRIPT = """
document.querySelectorAll(".slider input").forEach(function (input) {
  const names = JSON.parse(input.dataset.names);
  input.addEventListener("input", function () {
    const index = Number(input.value);
    input.parentElement.querySelector("output").textContent = index + 1 + ": " + names[index];
    for (const doc of Bokeh.documents)
      for (const plot of doc.roots())
        if (plot.name === input.dataset.plots) {
          const source = plot.renderers[0].data_source;
          const columns = new Set(source.columns());
          const shown = (name) => (columns.has(name + "-" + index) ? name + "-" + index : name);
          source.data = Object.fromEntries([...columns].map((name) => [name, source.get_column(shown(name))]));
        }
  });
});
"""

# A button hides or shows its series in every plot at once. Every plot is a root of the one Bokeh document, and every
# line, marker and band of a series bears the series' key as its name.
_LEGEND_SCRIPT = """
document.querySelectorAll(".legend button").forEach(function (button) {
  button.addEventListener("click", function () {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    for (const doc of Bokeh.documents)
      for (const plot of doc.roots())
        for (const renderer of plot.renderers)
          if (renderer.name === button.dataset.series) renderer.visible = on;
  });
});
"""

SCRIPT = _LEGEND_SCRIPT + _SLIDER_SCRIPT
"""Runs at the end of every page that has plots."""
