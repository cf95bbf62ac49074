import * as Plot from "@observablehq/plot";
export const plot = Plot.plot;
