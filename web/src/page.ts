import type { Page } from "./spec";
import { ChartView } from "./view";

/**
 * Bring the page of a report to life: a chart in each `[data-chart]`, and the menu of learning
 * rates, when there is one, for all of them.
 */
export function report(page: Page): void {
  const charts = new Map(page.charts.map((chart) => [chart.id, chart]));
  const menu = document.querySelector<HTMLSelectElement>("select[data-rate]");
  const rate = () => Number(menu?.value ?? 0);
  const views = [...document.querySelectorAll<HTMLElement>("[data-chart]")].flatMap((container) => {
    const chart = charts.get(container.dataset["chart"] ?? "");
    return chart ? [new ChartView(container, chart, page.arms, page.rates)] : [];
  });
  const show = () => views.forEach((view) => view.select(rate()));
  menu?.addEventListener("change", show);
  show();
}
