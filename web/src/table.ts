import { element } from "./dom";
import { onAxis, withBand } from "./format";
import type { Arm, Chart, Panel } from "./spec";

function table(chart: Chart, panel: Panel, arms: Arm[]): HTMLElement {
  const head = element("tr", {}, element("th", { scope: "col" }, chart.x.label));
  const rows = new Map<number, string[]>();
  for (const [column, line] of panel.lines.entries()) {
    head.append(element("th", { scope: "col" }, arms[line.arm]?.label ?? ""));
    line.x.forEach((x, i) => {
      const row = rows.get(x) ?? [];
      row[column] = withBand(chart.y, line.y?.[i], line.low?.[i], line.high?.[i]);
      rows.set(x, row);
    });
  }
  const body = element("tbody");
  for (const x of [...rows.keys()].sort((a, b) => a - b)) {
    const row = element("tr", {}, element("th", { scope: "row" }, onAxis(chart.x, x)));
    const cells = rows.get(x) ?? [];
    for (let i = 0; i < panel.lines.length; i++) row.append(element("td", {}, cells[i] ?? ""));
    body.append(row);
  }
  const caption = element("caption", {}, panel.title || chart.title);
  return element("table", {}, caption, element("thead", {}, head), body);
}

/** The numbers behind a chart, built when the reader opens them. */
export function numbers(arms: Arm[], shown: () => [Chart, Panel[]]): { node: HTMLElement; update(): void } {
  const name = "The numbers behind this chart";
  const scroll = element("div", {
    class: "bn-scroll",
    tabindex: "0",
    role: "region",
    "aria-label": name,
  });
  const node = element("details", { class: "bn-numbers" }, element("summary", {}, name), scroll);
  const update = () => {
    if (!node.open) return;
    const [chart, panels] = shown();
    scroll.setAttribute("aria-label", `${name}: ${chart.title}`);
    const unit = `${chart.y.label}${chart.band ? `; in brackets or alone: ${chart.band}` : ""}`;
    scroll.replaceChildren(
      element("p", { class: "bn-muted" }, unit),
      ...panels.map((panel) => table(chart, panel, arms)),
    );
  };
  node.addEventListener("toggle", update);
  return { node, update };
}
