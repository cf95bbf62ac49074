import { element } from "./dom";
import { legend } from "./legend";
import { cutOff, draw } from "./panel";
import { readout } from "./readout";
import type { Arm, Chart, Panel } from "./spec";
import { numbers } from "./table";

/** The entry of the menu that shows the overview. */
const OVERVIEW = "";

/** A chart in a container: legend, panels, what was found, and the numbers behind it. */
export class ChartView {
  private rate = 0;
  private layer = OVERVIEW;
  private width = 0;
  private readonly key = element("div");
  private readonly grid = element("div", { class: "bn-panels" });
  private readonly finding = element("p", { class: "bn-finding" });
  private readonly live = element("p", { class: "bn-hidden", "aria-live": "polite" });
  private readonly table: ReturnType<typeof numbers>;

  constructor(
    container: HTMLElement,
    private chart: Chart,
    private readonly arms: Arm[],
    private readonly rates: number[],
  ) {
    this.grid.style.setProperty("--columns", String(chart.columns));
    this.table = numbers(arms, () => [this.chart, this.shown()]);
    const bar = element("div", { class: "bn-bar" }, this.key);
    const menu = this.layerMenu();
    if (menu) bar.append(menu);
    container.replaceChildren(this.finding, bar, this.grid, this.live, this.table.node);
    // Panels have a width in pixels, so they are drawn again when there is more or less room.
    new ResizeObserver(() => {
      if (Math.abs(this.grid.clientWidth - this.width) > 1) this.draw();
    }).observe(this.grid);
  }

  /** Show another learning rate. */
  select(rate: number): void {
    this.rate = rate;
    this.draw();
  }

  /** Show new data in the same form. */
  update(chart: Chart): void {
    this.chart = chart;
    this.draw();
  }

  private layerMenu(): HTMLElement | null {
    if (!this.chart.overview) return null;
    const layers = [...new Set(this.chart.panels.map((panel) => panel.layer ?? ""))];
    const menu = element("select", {});
    menu.append(new Option(this.chart.overview.join(", "), OVERVIEW));
    for (const layer of layers) menu.append(new Option(layer, layer));
    menu.addEventListener("change", () => {
      this.layer = menu.value;
      this.draw();
    });
    return element("label", {}, "Layer ", menu);
  }

  private shown(): Panel[] {
    const { overview, panels } = this.chart;
    return panels.filter((panel) => {
      if (panel.rate !== undefined && panel.rate !== this.rate) return false;
      if (!overview || panel.layer === undefined) return true;
      return this.layer === OVERVIEW ? overview.includes(panel.layer) : panel.layer === this.layer;
    });
  }

  private draw(): void {
    this.width = this.grid.clientWidth;
    const { findings } = this.chart;
    const finding = [findings[""], findings[String(this.rate)]].filter(Boolean).join(" ");
    this.finding.textContent = finding;
    const shown = this.shown();
    this.key.replaceChildren(legend(this.chart, shown, this.arms));
    const holders = shown.map((panel) => ({ panel, holder: element("div", { class: "bn-panel" }) }));
    const rate = this.rates[this.rate];
    const none = element("p", { class: "bn-muted" }, `Nothing measured at learning rate ${rate}.`);
    this.grid.replaceChildren(...(holders.length ? holders.map(({ holder }) => holder) : [none]));
    for (const { panel, holder } of holders) {
      if (panel.title) holder.append(element("p", { class: "bn-title" }, panel.title));
      const unit = this.chart.y.label + (cutOff(panel) ? " (cut off at the frame)" : "");
      holder.append(element("p", { class: "bn-unit bn-muted" }, unit));
      const plot = draw(this.chart, panel, this.arms, holder.clientWidth, finding || this.chart.y.label);
      holder.append(plot);
      readout(holder, plot, this.chart, panel, this.arms, (text) => (this.live.textContent = text));
    }
    this.table.update();
  }
}
