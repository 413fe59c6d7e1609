// `node build.mjs` makes dist/, which is what is published; `node build.mjs test` makes build/, the tests.
import { build } from "esbuild";

const common = { bundle: true, format: "esm", target: "es2022", logLevel: "warning" };

// The hook's file imports the client's, instead of holding it once more.
const keepApart = {
  name: "keep-apart",
  setup: ({ onResolve }) =>
    onResolve({ filter: /^\.\/index\.js$/ }, ({ path }) => ({ path, external: true })),
};

if (process.argv[2] === "test") {
  await build({ ...common, entryPoints: ["test/core.test.ts"], outdir: "build", platform: "node" });
} else {
  await build({
    ...common,
    entryPoints: ["src/index.ts", "src/react.ts"],
    outdir: "dist",
    minify: true,
    sourcemap: true,
    external: ["react"],
    plugins: [keepApart],
  });
}
