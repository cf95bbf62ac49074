import { defineConfig } from "vite";

// One classic script with everything inside: the report inlines it and works from file://.
export default defineConfig({
  build: {
    lib: { entry: "src/charts.ts", formats: ["iife"], name: "batchnorm", fileName: () => "charts.js" },
    emptyOutDir: true,
  },
});
