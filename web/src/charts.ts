/** The chart components, one script for the report and the lab: the global `batchnorm`. */
import styles from "./charts.css?inline";

export { report } from "./page";
export type { Arm, Axis, Chart, Line, Page, Panel, Rule } from "./spec";
export { ChartView } from "./view";

const sheet = document.createElement("style");
sheet.textContent = styles;
document.head.append(sheet);
